"""Run folders that begin with given parameters: made from other models, and continued with ``minimoe train --resume``.

The folder holds a checkpoint of step 0: the parameters, an optimiser that has seen no gradient, and the random state of
the recipe's seed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from minimoe.core import files, tree
from minimoe.core.arrays import to_host
from minimoe.core.errors import UserError
from minimoe.layers.decoder import Decoder
from minimoe.optim import optimizer
from minimoe.storage import checkpoint, huggingface
from minimoe.storage.checkpoint import Model, Progress, RunConfig
from minimoe.text import batches
from minimoe.text.corpus import Corpus

ADAPTERS = ("lora", "freeze")
"""What ``Tuning.settings`` say of adapters; see ``tuning.lora_run``."""


def write(folder: str | Path, run: RunConfig, params: Decoder) -> None:
    """Writes a run that has taken no step into a new folder.

    config.json is written last: a folder without it is not a run, so a crash cannot leave a run that would begin with
    random parameters.

    Raises:
        UserError: the folder is not empty or cannot be written.
    """
    folder = files.user_path(folder)
    host = tree.map(lambda leaf: to_host(leaf).astype(run.recipe.dtype, copy=False), params)
    rng = np.random.default_rng(run.recipe.seed)
    files.new_folder(folder)
    progress = Progress(0, 0.0, dict(rng.bit_generator.state))
    checkpoint.save(folder, run, host, optimizer.init(host, run.recipe), progress)
    checkpoint.save_config(folder, run)


def load(folder: str | Path) -> Model:
    """The model of a run, if new runs can be made from it.

    Raises:
        UserError: the run is damaged or quantised, or it was not trained here and so has no recipe and no text.
    """
    if huggingface.is_folder(files.user_path(folder)):
        raise UserError(f"{folder} is a Hugging Face model, which has no recipe and no text: give the folder of a run.")
    model = checkpoint.load_model(folder)
    if model.run.quantization is not None:
        raise UserError(f"{folder} is quantised and cannot be trained further: give the run that it came from.")
    return model._replace(run=_without_adapters(model.run))


def _without_adapters(run: RunConfig) -> RunConfig:
    """The run without the settings of adapters, which are merged in its model: a new run has all weights to learn."""
    if run.tuning is None or not any(name in run.tuning.settings for name in ADAPTERS):
        return run
    settings = {name: value for name, value in run.tuning.settings.items() if name not in ADAPTERS}
    return run._replace(tuning=run.tuning._replace(settings=settings, frozen=()))


def with_text(run: RunConfig, corpus: str | Corpus | None) -> RunConfig:
    """The run on another text, encoded by the run's own tokenizer; ``None`` leaves the text as it is.

    Raises:
        UserError: the run reads no text; or the text cannot be read, is too short, or holds a character that the
            tokenizer does not know.
    """
    if corpus is None:
        return run
    if run.tuning is not None and "base" in run.tuning.settings:  # not a student, which reads a text
        raise UserError("a tuned run learns from answers and reads no text: leave the text out.")
    return run._replace(source=batches.prepare_again(corpus, run.tokenizer, run.config.context)[1])
