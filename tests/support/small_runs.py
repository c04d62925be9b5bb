"""Runs so small that one test can train many of them, and what of a run must repeat to the bit."""

import atexit
import dataclasses
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from minimoe.core import files
from minimoe.core.config import ModelConfig, TrainConfig
from minimoe.core.presets import Preset, override
from minimoe.storage import checkpoint
from minimoe.text.corpus import Corpus
from minimoe.training import run_report, trainer
from minimoe.training.trainer import Trained

PYRAMID = "".join(f"{n} steps up, {n * n} stones laid; ça monte à {n + 7} pieds.\n" for n in range(30))
SEASONS = "".join(f"In year {n} the spring was {'wet' if n % 3 else 'dry'} and the harvest fair.\n" for n in range(25))
CORPUS = Corpus("small", {"pyramid": PYRAMID, "seasons": SEASONS})

CONFIG = ModelConfig(
    width=8, layers=2, heads=2, kv_heads=1, head_width=4, context=8, experts=4, active_experts=2, expert_width=8
)
RECIPE = TrainConfig(
    steps=6, batch=4, warmup=2, importance_loss=0.1, load_loss=0.1, evaluate_every=3, save_every=2, capacity_factor=1.0
)
SMALL = Preset("a few milliseconds", CONFIG, RECIPE)

TIMINGS = ("tokens_per_second", "seconds")
WRITE = run_report.write


def train(out: Path, corpus: Corpus | str = CORPUS, threads: int = 1, **settings: Any) -> Trained:
    """A small run in ``out``, with some settings of its own."""
    preset = override(SMALL, settings)
    return trainer.train(preset, corpus=corpus, out=out, device="cpu", threads=threads, progress=False)


def resume(folder: Path, corpus: Corpus | None = CORPUS, threads: int = 1, **changes: Any) -> Trained:
    """Continues a small run."""
    return trainer.resume(folder, corpus=corpus, changes=changes, device="cpu", threads=threads, progress=False)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without their checksums."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "crc32"} for row in rows]


def lasting(folder: Path) -> dict[str, Any]:
    """All of a run that must not depend on interruptions: every bit of both checkpoints, and metrics but timings."""
    state, about_state = files.read_tensors(folder / checkpoint.RESUME)
    params, about_params = files.read_tensors(folder / checkpoint.MODEL)
    progress = json.loads(about_state["progress"])
    del progress["seconds"]
    rows = [{name: value for name, value in row.items() if name not in TIMINGS} for row in metrics(folder)]
    bits = {name: (str(values.dtype), values.shape, values.tobytes()) for name, values in state.items()}
    model_bits = {name: (str(values.dtype), values.shape, values.tobytes()) for name, values in params.items()}
    return {"state": bits, "model": model_bits, "about": about_params, "progress": progress, "metrics": rows}


@cache
def finished() -> Path:
    """One finished run with all its files, made once; read it, but do not change it."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    text = folder / "pyramid.txt"
    text.write_text(PYRAMID, encoding="utf-8")
    from minimoe.text import corpus

    with pytest.MonkeyPatch.context() as patch:  # a test that replaces what is written at the end may be the first here
        patch.setattr(run_report, "write", WRITE)
        train(folder / "run", corpus.read_files(text))
    return folder / "run"


def options(**settings: Any) -> list[str]:
    """The small preset, with some settings of its own, as options of ``minimoe train``."""
    preset = override(SMALL, settings)
    values = dataclasses.asdict(preset.config) | dataclasses.asdict(preset.recipe)
    del values["vocab_size"]
    words = []
    for name, value in values.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", "none" if value is None else str(value)]
    return words
