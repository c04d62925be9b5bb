"""Reads a folder with a model and writes a new one with quantised weights, in the same layout.

Every command opens the new folder as it opens the old one, because the weights become float32 when they are loaded.
Only the file is smaller: a loaded model needs as much memory and time as before.
"""

from __future__ import annotations

from pathlib import Path

from minimoe.compression import quantize
from minimoe.compression.quantize import Size
from minimoe.core import files
from minimoe.core.errors import UserError
from minimoe.storage import checkpoint, huggingface, huggingface_config, open_model
from minimoe.storage.checkpoint import Model


def write(source: str | Path, out: str | Path, experts: str, attention: str | None = None) -> list[Size]:
    """Writes the model of the folder ``source`` to the new folder ``out``; returns the size of each part.

    ``experts`` and ``attention`` are schemes of ``compression.quantize``; without ``attention``, ``experts`` is used
    for both.

    Raises:
        UserError: there is no such scheme; ``source`` cannot be loaded or is quantised already; a weight cannot be
            quantised; or ``out`` is not empty or cannot be written.
    """
    plan = quantize.plan(experts, attention)
    source, out = files.user_path(source), files.user_path(out)
    files.refuse_occupied(out)  # before the work, not after it
    if huggingface.is_folder(source) and huggingface_config.read(source).plan is not None:
        raise UserError(f"{source} is quantised already: quantise the model that it came from.")
    model = open_model.load(source)
    if isinstance(model, Model):
        checkpoint.save_quantized(out, model, plan)
    else:
        huggingface.save(out, model.params, model.config, model.tokenizer, model.end_tokens, plan)
    return quantize.sizes(model.config, plan)
