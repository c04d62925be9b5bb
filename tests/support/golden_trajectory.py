"""Fifty steps of training, told once: every loss that the preset ``tiny`` went through. Run this file to tell it anew.

    python tests/support/golden_trajectory.py

Do so after a change that is meant to change what training does: other draws, another formula, another corpus. The
settings are kept with the losses, so a preset may be tuned without a new telling.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

from minimoe.core import config, presets
from minimoe.core.config import ModelConfig, TrainConfig
from minimoe.core.presets import Preset
from minimoe.training import trainer

PATH = Path(__file__).resolve().parent.parent / "golden" / "trajectory.json"
DTYPES = ("float32", "float64")


def told() -> dict[str, Any]:
    """What the file says: the settings, and for each dtype the losses."""
    return json.loads(PATH.read_text(encoding="utf-8"))


def preset(settings: dict[str, Any], **changes: Any) -> Preset:
    """The settings of the file as a preset, some of them changed."""
    model, recipe = config.from_dict(ModelConfig, settings["model"]), config.from_dict(TrainConfig, settings["train"])
    return presets.override(Preset("golden", model, recipe, settings["corpus"]), changes)


def losses(chosen: Preset, out: Path, threads: int = 1) -> dict[str, list[float]]:
    """The losses of a new run in ``out``: in training, with the auxiliary ones, and in validation."""
    rows = trainer.train(chosen, out=out, device="cpu", threads=threads, progress=False).metrics
    return {
        "loss": [row["loss"] for row in rows],
        "total": [row["total"] for row in rows],
        "val_loss": [row["val_loss"] for row in rows if "val_loss" in row],
    }


def write() -> None:
    """Trains with the preset as it is now, and keeps settings and losses."""
    tiny = presets.preset("tiny")
    settings = {
        "corpus": tiny.corpus,
        "model": dataclasses.asdict(tiny.config),
        "train": dataclasses.asdict(tiny.recipe),
    }
    settings["train"]["steps"] = 50
    with tempfile.TemporaryDirectory() as room:
        runs = {dtype: losses(preset(settings, dtype=dtype), Path(room) / dtype) for dtype in DTYPES}
    lines = ",\n".join(f'"{name}": {json.dumps(value)}' for name, value in {**settings, **runs}.items())
    PATH.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    write()
