"""Opens a model from its folder, whether it was trained here or elsewhere."""

from __future__ import annotations

from pathlib import Path

from minimoe.core import files
from minimoe.core.config import ModelConfig
from minimoe.storage import checkpoint, huggingface, huggingface_config
from minimoe.storage.checkpoint import Model
from minimoe.storage.huggingface import Pretrained


def load(folder: str | Path) -> Model | Pretrained:
    """The model in ``folder``, on the host: a run, or a model of ``huggingface_families`` in Hugging Face's layout.

    If ``storage.quantized`` wrote the folder, the weights become float32 again.

    Raises:
        UserError: the folder holds neither, or its files are damaged or do not belong together.
    """
    folder = files.user_path(folder)
    return huggingface.load(folder) if huggingface.is_folder(folder) else checkpoint.load_model(folder)


def shape(folder: str | Path) -> ModelConfig:
    """The config of the model in ``folder``, without reading its weights; raises ``UserError`` like ``load``."""
    folder = files.user_path(folder)
    if huggingface.is_folder(folder):
        return huggingface_config.read(folder).config
    return checkpoint.load_config(folder).config
